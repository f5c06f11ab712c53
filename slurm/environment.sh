# Sourced by every script here. Change what your cluster needs; each variable says why it is set.

# The interpreter that has the project installed. In a container: its python.
export PYTHON="${PYTHON:-$RPSD_ROOT/.venv/bin/python}"
# Job steps import the package and tests of the folder that the job was submitted from.
export PYTHONPATH="$RPSD_ROOT${PYTHONPATH:+:$PYTHONPATH}"
# Log lines appear when they are written, not when a buffer is full.
export PYTHONUNBUFFERED=1
# Megatron's tensor and context parallelism overlap communication with computation only if kernels start in the order
# they were given: one hardware queue. Blackwell does not need it, and is not hurt.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# Lengths differ between view pairs, so block sizes differ; growing segments keep freed blocks of another size usable.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
# A rank that fails in a collective raises there, instead of hanging until the scheduler's limit.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
# Where NCCL waited is written when its timeout strikes.
export TORCH_NCCL_TRACE_BUFFER_SIZE="${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}"
# The links between nodes. Unset, NCCL chooses; a wrong choice (a management network) costs most of the speed.
# export NCCL_SOCKET_IFNAME=eth0
# export NCCL_IB_HCA=mlx5
# Which topology and transport NCCL found; look once on a new cluster.
# export NCCL_DEBUG=INFO
# Transformer Engine: let it choose among flash-attn and cuDNN; set to 0 to rule one out.
export NVTE_FLASH_ATTN="${NVTE_FLASH_ATTN:-1}"
export NVTE_FUSED_ATTN="${NVTE_FUSED_ATTN:-1}"
# Tokenizers fork under data loader workers; their own threads would only warn.
export TOKENIZERS_PARALLELISM=false
# One thread for each rank's CPU operations; torchrun sets the same and warns about it.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# srun does not take it over from sbatch, and one core for all ranks of a node would be little.
export SRUN_CPUS_PER_TASK="${SRUN_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-}}"
[ -n "$SRUN_CPUS_PER_TASK" ] || unset SRUN_CPUS_PER_TASK

# Containers, off by default. PYTHON is then the container's.
# pyxis/enroot: options of srun. Checks run on the submit host and the batch host outside of it, by RPSD_HOST_PYTHON.
#   export RPSD_SRUN_OPTIONS="--container-image=/images/rpsd.sqsh --container-mounts=/data,$RPSD_ROOT"
#   export RPSD_HOST_PYTHON="$RPSD_ROOT/.venv/bin/python"
export RPSD_SRUN_OPTIONS="${RPSD_SRUN_OPTIONS:-}"
# apptainer: a command that every node's launcher, and every check, is started with.
#   export RPSD_WRAPPER="apptainer exec --nv --bind /data,$RPSD_ROOT /images/rpsd.sif"
export RPSD_WRAPPER="${RPSD_WRAPPER:-}"
