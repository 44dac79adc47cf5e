"""What is measured of media: how ranks came by opened images and videos."""

from __future__ import annotations

from collections.abc import Mapping

MEDIA_METRICS: Mapping[str, str] = {
    "media/opened": "Images and videos decoded and patchified, over all ranks.",
    "media/prefetched": "Those of them that were opened while the step before ran.",
    "media/found": "Images and videos that a rank needed and found opened on its machine.",
    "media/not_kept": (
        "Images and videos opened although the machine had no room to keep them: they are opened "
        "again by every rank that needs them."
    ),
    "media/damaged": (
        "Kept images and videos that something else had changed; they are opened again."
    ),
    "media/cached_bytes": "Opened media kept in memory, on the machine that keeps the most.",
    "video_cache/hits": (
        "Videos whose frames were read from the folder of `data.video_cache_dir`, over all ranks."
    ),
    "video_cache/misses": "Videos decoded because their frames were not in that folder.",
    "video_cache/not_kept": (
        "Those of them that were not kept there: the folder or its disk is full, or faulty."
    ),
    "video_cache/evictions": "Videos whose frames were removed from the folder for others.",
    "video_cache/damaged": (
        "Videos whose kept frames were not as they had been written; they are decoded again."
    ),
    "video_cache/bytes": "Size of the folder, on the machine that keeps the most.",
}
