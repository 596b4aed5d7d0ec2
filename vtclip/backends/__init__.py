# SPDX-License-Identifier: Apache-2.0
"""What operators run on: schemas, and backends that load their implementation on first use."""
