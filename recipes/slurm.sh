#!/bin/bash
# Train on several nodes under Slurm. From the repository root:
#     sbatch recipes/slurm.sh OUT --config recipes/llama3-instruct-simpo.toml
#
# Runs one torchrun per node. Weights are sharded within a node and every node holds a copy
# (--replicate), so only gradients travel between nodes, once per step. Slurm sends a signal three
# minutes before the time limit or on preemption. The run then saves and exits, and the job requeues
# itself and resumes. torchrun restarts failed workers up to twice. OUT, the checkpoint and the data
# must be visible to all nodes.
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
# Seconds that workers have to finish their step and save; the default is 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=170
export TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
# Otherwise restarted workers are given the addresses of the previous ones.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# A worker that is told to stop before the first step has no checkpoint to show, and creates this.
export TRAIN_STOPPED="$out.stopped"
mkdir -p "$(dirname "$out")" && rm -f "$TRAIN_STOPPED"
newest() { ls "$out/checkpoints" 2>/dev/null | grep -x 'step-[0-9]*' | sort -V | tail -n 1; }
before=$(newest)

srun --cpus-per-task "${SLURM_CPUS_PER_TASK:-1}" \
    torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --max-restarts 2 \
    --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" \
    train.py --out "$out" --replicate "$SLURM_NNODES" --save-every 50 "$@"
status=$?

# Requeue an unfinished run if it saved a newer checkpoint, or was told to stop: 75, or the signal
# itself if that came while torchrun started. Otherwise an error would repeat. OUT.stops has a line
# for each stop since the last checkpoint; after three, the time limit is too short for one.
case $status in 75 | 138 | 143) touch "$TRAIN_STOPPED" ;; esac
[ "$(newest)" = "$before" ] || rm -f "$out.stops"
if [ -d "$out/model" ]; then
    rm -f "$out.stops"
elif [ "$(newest)" != "$before" ]; then
    scontrol requeue "$SLURM_JOB_ID"
elif [ -e "$TRAIN_STOPPED" ]; then
    echo "job $SLURM_JOB_ID" >> "$out.stops"
    if [ "$(wc -l < "$out.stops")" -le 3 ]; then
        scontrol requeue "$SLURM_JOB_ID"
    else
        rm -f "$out.stops" # whoever submits it again has raised the time limit
        echo "slurm.sh: stopped four times without a new checkpoint: not requeued" >&2
    fi
fi
