"""Nemotron-TwoTower in JAX: a frozen autoregressive context tower and a block-diffusion denoiser tower."""

__version__ = "0.2.0"
