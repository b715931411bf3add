"""Search: the only package that knows Optuna and Ray Tune."""

import os

import optuna

# Read when Ray Tune is imported: its own console output and per-trial CSV and TensorBoard files are not wanted,
# since the study and the tracker hold every result.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
# Robustness is measured once, when a trial ends, so that its earlier results lack that objective.
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
optuna.logging.set_verbosity(optuna.logging.WARNING)
