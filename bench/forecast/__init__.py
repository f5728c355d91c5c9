"""How good the forecast is, beside what others do: ranking, error, calibration, cost."""
