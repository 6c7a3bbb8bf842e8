"""Package metadata.  `kernels/` and `data_prep/` are imported as fastssl.kernels and fastssl.data_prep:
a top-level package called `kernels` would clash with the one on PyPI."""

from setuptools import setup

TEST = ["pytest>=8", "pytest-timeout", "ruff>=0.8", "scipy"]

setup(
    name="fastssl",
    version="0.1.0",
    description="Self-supervised image pretraining: decode once, fused GPU views and losses, exact on any number of ranks",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",
    packages=[
        "fastssl", "fastssl.methods", "fastssl.eval",
        "fastssl.kernels", "fastssl.data_prep",
    ],
    package_dir={"fastssl.kernels": "kernels", "fastssl.data_prep": "data_prep"},
    install_requires=[
        "torch>=2.11,<2.12", "torchvision>=0.26,<0.27",
        "numpy>=2,<2.4",  # Triton 3.6's interpreter breaks on 2.4
        "ffcv==1.0.2", "numba>=0.62,<0.69",
        "deepspeed==0.19.8",  # older releases differ in accumulation and clipping
        "scikit-learn>=1.5", "pillow>=10", "safetensors", "timm>=1.0.12",
        "tensorboard", "rich", "matplotlib",
    ],
    extras_require={
        "gpu": ["faiss-gpu==1.15.1", "cupy-cuda13x>=14"],
        "test": TEST,
    },
    entry_points={"console_scripts": ["fastssl=fastssl.__main__:main"]},
)
