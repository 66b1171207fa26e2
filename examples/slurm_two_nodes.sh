#!/bin/bash
#SBATCH --nodes=2 --ntasks=2
# One site over two nodes: one torchrun a task, and sites.NAME.ranks ranks in all.
#   provision: {mode: slurm, script: examples/slurm_two_nodes.sh}        (provision.py fills in what stands in braces)
# sbatch's own options in `provision.options` go over the line above, e.g. `--nodes=4` and `--ntasks=4`. Those for GPUs
# count per node: `--gres=gpu:4` where two nodes make 8 ranks.
cd {folder} || exit 1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONUNBUFFERED=1
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000)) # two sites may share a node
# One dead task ends the site, which is then started again. Since Slurm 22.05 srun does not see how many CPUs a task has.
exec srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    {python} -m torch.distributed.run --nnodes="$SLURM_NTASKS" --nproc_per_node="$(({ranks} / SLURM_NTASKS))" \
    --rdzv_backend=c10d --rdzv_id={job} --rdzv_endpoint="$head:$port" {repo}/train.py {config} site={site}
