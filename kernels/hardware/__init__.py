"""What ops need of the hardware: Pallas on TPU, Mosaic GPU and Triton on NVIDIA GPUs."""
