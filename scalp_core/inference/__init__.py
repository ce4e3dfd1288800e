"""Inference from pixels to answers: runtimes, predictor, calibration, decision, Grad-CAM."""
