"""Calibration: which directions of K and V a model is sensitive to, and so where bits are worth spending."""
