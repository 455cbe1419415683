"""Where the packages lie; everything else about the distribution stands in pyproject.toml."""

from setuptools import setup

setup(
    packages=["fomaml_fused", "fomaml_fused.engines", "fomaml_fused.train", "fomaml_fused.kernels"],
    package_dir={"fomaml_fused.kernels": "kernels"},
    include_package_data=False,  # else the folder of tables is taken for a package that was forgotten
    package_data={"fomaml_fused.kernels": ["configs/*.json", "native/*"]},
)
