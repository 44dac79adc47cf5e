"""Process groups, exchanges between ranks, and where megatron-core's versions differ."""

from zppo_mm.parallel.gpu_packages import hide_without_gpu
from zppo_mm.parallel.megatron_cpu import leave_uncompiled
from zppo_mm.parallel.megatron_versions import allow_missing_triton

# Before any module of this project imports megatron.core.
hide_without_gpu()
allow_missing_triton()
leave_uncompiled()
