"""From pixels to an answer: runtimes, predictor, calibration, decision, Grad-CAM."""
