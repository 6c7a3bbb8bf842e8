"""Package metadata.  The folders `kernels`, `data_prep` and `configs` are installed as fastssl.kernels,
fastssl.data_prep and fastssl.configs, because PyPI has a package called `kernels`."""

from setuptools import find_namespace_packages, find_packages, setup

FOLDERS = ("kernels", "data_prep", "configs")
packages = find_packages(include=["fastssl", "fastssl.*"])
for folder in FOLDERS:
    inner = find_namespace_packages(folder, exclude=["*__pycache__*"])  # folders of configs have no __init__.py
    packages += [f"fastssl.{folder}", *(f"fastssl.{folder}.{name}" for name in inner)]

setup(
    name="fastssl",
    version="0.1.0",
    description="Self-supervised image pretraining: each image decoded once, views computed on the device, "
    "losses exact on any number of ranks",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",
    packages=packages,
    package_dir={f"fastssl.{folder}": folder for folder in FOLDERS},
    package_data={"fastssl.configs.detection": ["*.yaml"], "fastssl.report": ["page.css", "page.js"]},
    install_requires=[
        "torch>=2.11,<2.12",
        "torchvision>=0.26,<0.27",
        "numpy>=2,<2.4",  # Triton 3.6's interpreter breaks on 2.4
        "ffcv==1.0.2",
        "numba>=0.62,<0.69",
        "deepspeed==0.19.8",  # older releases differ in accumulation and clipping
        "scikit-learn>=1.5",
        "joblib",
        "threadpoolctl",
        "pillow>=10",
        "safetensors",
        "timm>=1.0.12",
        "tensorboard",
        "rich",
        "matplotlib",
    ],
    extras_require={
        "gpu": ["faiss-gpu==1.15.1", "cupy-cuda13x>=14"],  # large, and of use with an NVIDIA GPU only
        "umap": ["umap-learn>=0.5.9"],
        "detection": ["pycocotools>=2.0.8"],
        "test": [
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "pycocotools>=2.0.8",
            "mypy>=2.4,<2.5",  # a newer one may find more
            "pyyaml",
            "ruff>=0.8",
            "scipy",
            "umap-learn>=0.5.9",
            "setuptools>=77",  # tests/test_packaging.py builds a wheel
        ],
    },
    entry_points={"console_scripts": ["fastssl=fastssl.__main__:main"]},
)
