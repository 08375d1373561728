# SPDX-License-Identifier: Apache-2.0
"""Text around the model: tokenizer, chat template, reasoning, stop strings and tool calls."""
