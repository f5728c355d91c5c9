"""The predictor's parts."""
