# SPDX-License-Identifier: Apache-2.0
"""Sizes, variants and layouts that every operator is run with.

They were chosen by coverage: each remainder of the widths read at once, two passes of every
loop, several tiles with a part of one, whole tiles alone, and one of everything. One star puts a
case into the short list of the CUDA library, two into that of every set.
"""

from __future__ import annotations

# operator -> rows of sizes; variant; layout
TABLE = {
    "rational_logits": """
        ** B3 K5 D37
        * B2 K70 D136
        B1 K1 D1
        B2 K9 D64 ;; gaps
        B4 K8 D129
        B2 K65 D8 ;; misaligned
        B33 K40 D200
        B5 K7 D300 ;; transposed
        B3 K5 D38
        B3 K5 D39
        B3 K130 D42
        B3 K5 D43
        B9 K70 D264
        B513 K9 D16
        B4 K8 D256
    """,
    "unit_products": """
        ** B3 K5 D37
        * B2 K300 D16
        B1 K1 D1
        B70 K90 D40
        B2 K9 D64 ;; gaps
        B4 K8 D129
        B33 K40 D200 ;; misaligned
        B5 K7 D300 ;; transposed
        B3 K1100 D20
        B3 K5 D38
        B3 K5 D39
        B3 K5 D42
        B3 K5 D43
        B5 K6 D40 ;; extremes
        B70 K300 D520
        B67 K130 D139
        B5 K6 D41 ;; extremes
        B2 K3 D6200 ;; extremes
        B2 K3 D6203 ;; extremes
        B16 K8 D256
    """,
    "cosine_logits": """
        ** B5 K39 D37
        ** B3 K7 D37 ; text per image
        * B130 K200 D24
        * B513 K961 D8
        B1 K1 D1
        B1 K1 D1 ; text per image
        B2 K9 D64 ;; gaps
        B2 K9 D64 ; text per image ; gaps
        B4 K8 D129
        B33 K40 D200 ;; misaligned
        B5 K7 D300 ; text per image ; misaligned
        B5 K70 D136 ; text per image
        B3 K7 D38 ; text per image
        B3 K7 D39
        B3 K7 D42 ; text per image
        B3 K7 D43
        B5 K7 D300 ;; transposed
        B5 K6 D40 ;; extremes
        B5 K6 D40 ; text per image ; extremes
        B70 K90 D520
        B37 K39 D267
        B37 K39 D264 ;; extremes
        B449 K961 D131
        B9 K70 D264 ; text per image
        B449 K968 D136 ;; extremes
        B5 K6 D201 ;; extremes
        B5 K6 D201 ; text per image ; extremes
        B2 K3 D6200
        B2 K3 D6203
        B5 K7 D256
        B3 K16 D256 ; text per image
        B449 K961 D64
    """,
    "norm_cosine_logits": """
        ** B3 K5 C37
        * B2 K9 C136
        B1 K1 C2
        B1 K1 C3
        B2 K9 C64 ;; gaps
        B4 K8 C129
        B33 K40 C200
        B5 K7 C300 ;; misaligned
        B2 K65 C8 ;; transposed
        B2 K130 C38
        B3 K5 C39
        B3 K5 C42
        B3 K5 C43
        B5 K6 C40 ;; extremes
        B9 K70 C264
        B9 K35 C523
        B5 K6 C41 ;; extremes
        B1 K2 C1800
        B1 K44 C520
        B1 K56 C520
        B3 K8 C256
    """,
    "ffn_cosine_logits": """
        ** B3 K5 C37 F11
        * B2 K18 C40 F8 ; features frozen
        B1 K5 C1030 F3
        B1 K1 C5 F1
        B2 K9 C64 F5 ;; gaps
        B4 K8 C129 F16
        B33 K40 C200 F5
        B5 K7 C300 F9 ;; misaligned
        B2 K65 C8 F4 ;; transposed
        B2 K130 C38 F6
        B3 K5 C39 F7
        B3 K5 C42 F10
        B3 K5 C43 F12
        B5 K6 C40 F8 ;; extremes
        B9 K70 C264 F24
        B9 K35 C523 F9
        B5 K6 C41 F8 ;; extremes
        B3 K5 C40 F300
        B1 K2 C1800 F8
        B3 K8 C256 F64
    """,
    "cross_attn": """
        ** B2 H2 K19 L21 d24 ; masked
        * B2 H1 K67 L70 d35 ; query per image
        * B2 H1 K19 L21 d72 ; masked
        * B2 H1 K19 L21 d136 ; masked
        B1 H1 K1 L1 d1
        B3 H1 K65 L16 d64 ; masked
        B2 H3 K16 L129 d32 ; query per image, masked
        B1 H2 K130 L65 d128 ; lse unused
        B2 H1 K33 L63 d256 ; masked
        B9 H1 K5 L3 d8
        B2 H1 K67 L70 d64 ; masked ; misaligned
        B2 H1 K19 L70 d128 ; masked ; gaps
        B2 H2 K19 L21 d64 ;; heads-inner
        B2 H1 K67 L130 d200 ; query per image ; transposed
        B2 H1 K9 L9 d64 ; masked ; expanded
        B600 H1 K2 L3 d8 ; masked
        B2 H1 K9 L9 d34
        B2 H1 K9 L9 d36
        B2 H1 K9 L9 d37 ; query per image
        B2 H1 K9 L9 d38
        B2 H1 K9 L9 d39
        B2 H1 K67 L70 d100 ; masked
        B2 H1 K67 L70 d128 ; masked ; misaligned
        B2 H1 K67 L133 d96 ; query per image, masked
        B2 H1 K67 L70 d176 ; masked ; misaligned
        B2 H1 K67 L70 d160 ; masked
        B2 H1 K67 L136 d256 ; query per image
        B2 H1 K33 L70 d255 ; masked
        B2 H1 K67 L70 d127 ; query per image, masked
        B2 H1 K19 L21 d127 ; masked
        B2 H1 K19 L21 d255 ; query per image
        B2 H1 K0 L5 d24
        B2 H1 K0 L5 d72 ; query per image
        B2 H1 K0 L5 d136
        B600 H1 K2 L3 d65 ; masked
        B2 H1 K64 L128 d64 ; masked
    """,
    "cross_attn_weights": """
        ** B2 H2 K19 L21 d24 ; masked
        * B2 H1 K67 L70 d35 ; query per image
        * B2 H1 K19 L21 d72 ; masked
        * B2 H1 K19 L21 d136 ; masked
        B1 H1 K1 L1 d1
        B3 H1 K65 L16 d64 ; masked
        B2 H3 K16 L129 d32 ; query per image, masked
        B1 H2 K130 L65 d128
        B2 H1 K33 L63 d256 ; masked
        B9 H1 K5 L3 d8
        B2 H1 K67 L70 d64 ; masked ; misaligned
        B2 H1 K19 L72 d128 ; masked ; gaps
        B600 H1 K2 L3 d8 ; masked
        B2 H1 K9 L9 d34
        B2 H1 K9 L9 d36
        B2 H1 K9 L9 d37 ; query per image
        B2 H1 K9 L9 d38
        B2 H1 K9 L9 d39
        B2 H1 K67 L70 d100 ; masked
        B2 H1 K67 L70 d128 ; masked ; misaligned
        B2 H1 K67 L133 d96 ; query per image, masked
        B2 H1 K67 L70 d176 ; masked ; misaligned
        B2 H1 K67 L70 d160 ; masked
        B2 H1 K67 L136 d256 ; query per image
        B2 H1 K33 L70 d255 ; masked
        B2 H1 K67 L70 d127 ; query per image, masked
        B2 H1 K19 L21 d127 ; masked
        B2 H1 K19 L21 d255 ; query per image
        B2 H1 K0 L5 d24
        B2 H1 K0 L5 d72 ; query per image
        B2 H1 K0 L5 d136
        B2 H1 K64 L128 d64 ; masked
    """,
    "rational_attn": """
        ** B2 H2 K7 d24
        ** B2 H1 K70 d40
        * B2 H1 K19 d104 ; text query per image
        * B2 H1 K35 d64 ; inference
        * B2 H1 K70 d200 ; no image query
        B1 H1 K1 d1
        B3 H1 K64 d64
        B2 H2 K65 d16 ; no image query
        B2 H1 K129 d65 ; text query per image
        B1 H3 K33 d128 ; text query alone
        B2 H1 K16 d129
        B2 H1 K10 d256 ; text query alone
        B2 H1 K70 d64 ;; misaligned
        B2 H1 K19 d128 ;; gaps
        B2 H2 K19 d64 ;; heads-inner
        B600 H1 K3 d8
        B2 H1 K9 d34
        B2 H1 K9 d35 ; text query per image
        B2 H1 K9 d36
        B2 H1 K9 d37
        B2 H1 K9 d38 ; no image query
        B2 H1 K9 d39
        B2 H1 K70 d100 ; text query per image
        B2 H1 K70 d128 ;; misaligned
        B2 H1 K133 d96
        B2 H1 K70 d136 ;; misaligned
        B2 H1 K133 d256
        B2 H1 K70 d255 ; text query per image
        B1 H1 K600 d8
        B1 H1 K300 d8
        B2 H1 K70 d72 ; inference
        B1 H1 K131 d127
        B2 H1 K9 d40 ; image query alone
        B2 H1 K70 d100 ; image query alone
        B2 H1 K128 d64
    """,
    "rational_head": """
        * B3 K5 D37 ; none
        ** B2 K35 D70 ; l1, features frozen
        * B3 K5 D37 ; mse
        ** B3 K5 D300 ; linf
        ** B1 K300 D300 ; l1
        B3 K5 D40 ; linf
        B1 K300 D24 ; l1
        B1 K1 D1 ; none
        B2 K9 D64 ; none ; gaps
        B4 K8 D129 ; linf
        B2 K65 D8 ; mse ; misaligned
        B33 K40 D200 ; linf
        B5 K7 D300 ; none ; transposed
        B5 K7 D300 ; linf ; gaps
        B3 K5 D38 ; mse
        B3 K5 D39 ; l1
        B3 K5 D42 ; linf
        B3 K5 D43 ; none
        B5 K70 D264 ; mse
        B9 K130 D520 ; linf
        B3 K70 D267 ; none
        B2 K19 D1030 ; l1
        B1 K600 D300 ; linf
        B2 K300 D300 ; linf ; NaN
        B2 K64 D256 ; linf
    """,
    "column_sums": """
        ** R37 N40
        R1 N1
        R200 N100 ;; gaps
    """,
    "relu_gradient": """
        ** R70 N200
        R1 N1
        R33 N129 ;; misaligned
        R40 N64 ;; gaps
        R390 N25600
    """,
    "sum_norm": """
        ** B3 K19 C37
        ** B2 K5 C64
        B1 K1 C1
        B9 K70 C130 ;; misaligned
        B4 K10 C203 ;; gaps
        B33 K130 C268
        B2 K3 C1031
        B5 K6 C70
        B3 K8 C256
    """,
}
# of an operator without sizes of its own
USUAL = """
    ** B3 H2 K19 L21 d24 D37 C37 F11
    * B2 H1 K70 L67 d136 D136 C136 F40
"""
