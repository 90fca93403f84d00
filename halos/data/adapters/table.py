"""The adapters by the names that `format` takes."""

from halos.data.adapters import rows
from halos.data.adapters.adapter import Adapter, row_by_row
from halos.data.adapters.oasst import oasst
from halos.data.adapters.shp import shp

ADAPTERS: dict[str, Adapter] = {
    "hh": row_by_row("HH", rows.hh),
    "oasst": oasst,
    "s1k": row_by_row("s1K-1.1", rows.s1k),
    "safe_rlhf": row_by_row("PKU-SafeRLHF", rows.safe_rlhf),
    "shp": shp,
    "wildbench": row_by_row("WildBench", rows.wildbench),
}
