# SPDX-License-Identifier: Apache-2.0
"""The MQTT service: protocol (pure), broker, client connection, and the server around an LLM."""
