#!/bin/bash
# Nodes under Slurm, from the repository's root:   sbatch recipes/slurm.sh OUT --config recipes/llama3-instruct-simpo.toml
#
# One torchrun per node. Weights are sharded within a node, and every node has a copy (--replicate), so that only gradients
# travel between nodes, once a step. Three minutes before the job's time is up, or when it is preempted, Slurm's warning makes
# the run save and leave; the job then queues itself again and goes on from there. A worker that dies is started again twice.
# OUT, the checkpoint and the data lie where all nodes see them.
#SBATCH --job-name=simpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=08:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append

out=${1:?"usage: sbatch recipes/slurm.sh OUT [flags of train.py]"}
shift
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=170   # seconds in which the workers may finish their step and save; 30 if unset
export TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # workers that are started again must not find the addresses of those before
newest() { ls "$out/checkpoints" 2>/dev/null | grep -x 'step-[0-9]*' | sort -V | tail -n 1; }
before=$(newest)

srun --cpus-per-task "${SLURM_CPUS_PER_TASK:-1}" torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --max-restarts 2 \
    --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" \
    train.py --out "$out" --replicate "$SLURM_NNODES" --save-every 50 "$@"

if [ ! -d "$out/model" ] && [ "$(newest)" != "$before" ]; then # not done, but further than before: an error would repeat
    scontrol requeue "$SLURM_JOB_ID"
fi
