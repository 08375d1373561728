# SPDX-License-Identifier: Apache-2.0
"""What runs once per model: a checkpoint becomes a bundle."""
