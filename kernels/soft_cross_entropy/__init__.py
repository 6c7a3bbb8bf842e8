"""Cross entropy between a teacher's and a student's softmax over prototypes (DINO, https://arxiv.org/abs/2104.14294;
SwAV with sinkhorn_center), 65,536 and more, without storing the probabilities."""

import torch
from torch import Tensor

from ..common import Impl, check_rows, check_triton_dtype, choose
from . import reference


def soft_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    student_temperature: float,
    teacher_temperature: float | None,
    *,
    center: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Mean over rows of -sum_k p_k log softmax(student / student_temperature)_k; only the student gets a gradient.

    student and teacher (N, K) of any float dtypes.  p = softmax((teacher - center) / teacher_temperature), with an
    optional center (K,); teacher_temperature=None: the teacher's values are p itself (rows need not sum to 1).
    """
    check_rows("soft_cross_entropy", student_temperature, student=student, teacher=teacher)
    if student.shape != teacher.shape:
        raise ValueError(
            f"soft_cross_entropy: student is {tuple(student.shape)}, teacher {tuple(teacher.shape)}: must agree"
        )
    if teacher_temperature is None and center is not None:
        raise ValueError("soft_cross_entropy: a center is subtracted from teacher logits: pass teacher_temperature")
    if teacher_temperature is not None and not teacher_temperature > 0:
        raise ValueError(f"soft_cross_entropy: teacher_temperature={teacher_temperature}: must be above 0, or None")
    if center is not None and (center.shape != student.shape[1:] or center.device != student.device):
        raise ValueError(
            f"soft_cross_entropy: center is {tuple(center.shape)} on {center.device}: "
            f"expected {tuple(student.shape[1:])} on {student.device}"
        )
    if student.numel() == 0:
        return student.sum().to(torch.promote_types(student.dtype, torch.float32))
    if choose(impl, student) == "reference":
        return reference.soft_cross_entropy(student, teacher, student_temperature, teacher_temperature, center)
    check_triton_dtype("soft_cross_entropy", student=student, teacher=teacher)
    from . import triton

    return triton.soft_cross_entropy(student, teacher, student_temperature, teacher_temperature, center)
