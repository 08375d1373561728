# SPDX-License-Identifier: Apache-2.0
"""Run Nemotron-H language models: load a bundle, generate, close."""

from edgecascade.completion import Completion, Piece
from edgecascade.errors import EdgeCascadeError
from edgecascade.llm import LLM
from edgecascade.sampling import SamplingParams
from edgecascade.session import Session
from edgecascade.text.tools import ToolCall

__all__ = [
    "LLM",
    "Completion",
    "EdgeCascadeError",
    "Piece",
    "SamplingParams",
    "Session",
    "ToolCall",
]
