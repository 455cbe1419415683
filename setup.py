"""Where the packages lie; everything else about the distribution stands in pyproject.toml."""

from setuptools import setup

setup(
    packages=["fomaml_fused", "fomaml_fused.engines", "fomaml_fused.train", "fomaml_fused.kernels"],
    package_dir={"fomaml_fused.kernels": "kernels"},
    package_data={"fomaml_fused.kernels": ["configs/*.json"]},
)
