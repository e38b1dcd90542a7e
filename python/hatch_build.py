"""Puts the C library and its header into the wheel, and tags it for the platform that the library runs on.

`cargo xtask wheel` builds the library, reads the glibc version that it needs, and calls this with two variables:
the library's path and the wheel's platform tag.
"""

import os
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class LibraryHook(BuildHookInterface):
    """Adds files that are built outside of this folder."""

    def initialize(self, version, build_data):
        """Called before the wheel is written."""
        if version == "editable":
            raise ValueError("an editable installation has no C library; set LIQUIDGEMM_LIBRARY and PYTHONPATH instead")
        library, platform = (os.environ.get(name) for name in ("LIQUIDGEMM_BUILT_LIBRARY", "LIQUIDGEMM_PLATFORM"))
        if not library or not platform:
            raise ValueError("build the wheel with `cargo xtask wheel`, which builds the C library first")
        header = Path(self.root).parent / "crates/liquidgemm-c/include/liquidgemm.h"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
        build_data["force_include"][library] = "liquidgemm/libliquidgemm_c.so"
        build_data["force_include"][str(header)] = "liquidgemm/liquidgemm.h"
