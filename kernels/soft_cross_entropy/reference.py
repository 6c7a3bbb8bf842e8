"""The definition of the soft cross entropy in plain PyTorch: stores the probabilities of both sides."""

from torch import Tensor

from ..common import at_least_float32


def soft_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    student_temperature: float,
    teacher_temperature: float | None,
    center: Tensor | None,
) -> Tensor:
    p = at_least_float32(teacher.detach())
    if teacher_temperature is not None:
        p = ((p if center is None else p - center.detach()) / teacher_temperature).softmax(1)
    return -(p * (at_least_float32(student) / student_temperature).log_softmax(1)).sum(1).mean()
