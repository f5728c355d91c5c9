"""When a session will come back: the distribution of the gap that just began.

``kinds`` and ``shell`` reduce a tool call to a few canonical words, ``features`` to a small record;
``model`` holds what was learned and makes a `Forecast` of it; ``store`` keeps it on disk.
"""

from gateway.predictor.forecast import Forecast
from gateway.predictor.model import Context, Predictor

__all__ = ["Context", "Forecast", "Predictor"]
