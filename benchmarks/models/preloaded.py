"""Imports that every trial needs, loaded once in the process from which the others are forked."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import peft  # noqa: F401
import transformers  # noqa: F401

import cotolora  # noqa: F401
from benchmarks.models import families, tiny, trial  # noqa: F401
