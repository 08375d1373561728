# SPDX-License-Identifier: Apache-2.0
"""Every tolerance of the suite, each with its reason. A failing test is never mended here."""

from __future__ import annotations

# Float32 weights against transformers, absolute, on logits of about 4: the same sums in another
# order, through up to eight layers. The NumPy reference stays below 5e-6.
EXACT_LOGITS = 2e-4

# One backend against itself along another path (chunks, steps, batches), absolute, on logits of
# about 4: only the order of a chunk's sums differs.
SAME_MATHS = 5e-5

# Packed weights on the CPU against the reference with the same int8 activations, relative Frobenius
# distance of centred logits, the median of the rows: float32 rounding, plus the few activations
# that it moves to the neighbouring int8 code. Small models amplify such a one, so all rows are
# held together by INT8_ACTIVATIONS.
PACKED_LOGITS = 5e-3

# Packed weights with int8 activations against float32 activations, likewise, the median of the
# rows: a GEMV costs up to 1.2e-2, and a row whose router sits on a tie takes another expert.
INT8_ACTIVATIONS = 5e-2

# One ISA, or one way of cutting a prompt, against another: exp and the order of sums differ in the
# last bits, which can move an activation to the neighbouring int8 code.
LOGITS_BETWEEN_ISAS = 5e-3

# Relative Frobenius error of Gaussian weights in blocks: 9.03 % with the searched scale (9.5 % with
# the largest value on -8), and half a step of max/127 in 64 values, 0.59 %.
U4_GAUSSIAN = 9.1e-2
I8_GAUSSIAN = 6.5e-3

# Mamba-2 in float32, y and state, relative Frobenius distance: scan against token after token,
# which rounds the state at every token. Seen: 4e-7; the rest is margin.
SCAN = 1e-5

# Attention in float32 against NumPy's, likewise: the order of sums over 500 positions. Seen: 9e-7.
ATTENTION = 3e-6

# A step over 262,144 positions, likewise: its 1,024 parts are added one after the other, and those
# that are alike are all rounded the same way, by 2^-24. Seen: 1.2e-5.
LONG_ATTENTION = 1024 * 2.0**-24

# Prompts over fp16 pages on CUDA against the same, likewise: queries and exp(score - m) are rounded
# to half as keys and values are, 2^-12 relative on average, in scores of up to 10. Seen: 5e-4.
HALF_ATTENTION = 1e-3

# Log probabilities, absolute: the op sums exp in float32 runs of 512, the definition in float64.
LOGPROB = 1e-5

# Blocks times int8 activations against the same in float64, relative Frobenius distance: dots are
# exact integers, one float32 rounding per group of 64.
BLOCK_PRODUCT = 5e-7

# Float weights against float64, likewise: float32 sums of up to 300 products in vector order.
FLOAT_PRODUCT = 1e-6

# The same after a norm or an expert's up projection: one rounding apart, an activation takes the
# neighbouring int8 code, half a percent of its group's largest.
ROUNDED_ACTIVATIONS = 2e-3

# Router weights against NumPy's, relative: a float32 dot, exp and a division.
ROUTER_WEIGHTS = 1e-5

# Blocks on CUDA for up to 8 rows, likewise: the tensor cores cut products off, those of codes,
# which are subnormal halves, 6 bits earlier than others; and codes are multiplied with their
# offset, which makes the sums of one-sided rows 8 times larger on the way. Seen in the emulator,
# which cuts off as sm_80 to sm_89 do: 1.4e-5.
STORED_CODES = 2e-5

# Logits of a small model on CUDA's kernels against the reference, likewise: activations are
# rounded to half. Seen: 1.1e-3.
CUDA_LOGITS = 4e-3

# Float32 weights on CUDA's kernels against the CPU's, likewise: only the order of sums differs.
CUDA_EXACT = 1e-5

# KL(float16 || int8 keys and values) of the demo model, nats a token, the mean over 3,000 tokens of
# prompts and answers: a code is off by up to 0.4 % of its row's largest value. Seen: 1.3e-4, with
# all answers the same; INT4 weights cost 7e-4.
INT8_KV_KL = 5e-4
