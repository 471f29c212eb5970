# shellcheck shell=bash
# Common beginning of the scripts in jobs/: reads the site's settings, activates an environment that has dlion, and
# sets `launch`, the command that starts one process per task:
#
#   "${launch[@]}" dlion train ...
#
# It is srun or mpirun inside a Slurm job (DLION_LAUNCH=srun|mpirun|auto), and mpirun otherwise. Source this file in
# the root of the checkout.

set -euo pipefail
say() {
    printf 'jobs: %s\n' "$*" >&2
}

# shellcheck source=jobs/site.sh
source jobs/site.sh

if [ ! -f "env/machines/$DLION_MACHINE.sh" ]; then
    say "DLION_MACHINE=$DLION_MACHINE is unknown: choose a file of env/machines, without .sh, in jobs/site.sh"
    exit 2
fi
# Sets in_image, the command that runs another in a container; empty without a container.
# shellcheck source=env/machines/checkout.sh
source "env/machines/$DLION_MACHINE.sh"

in_job() {
    [ -n "${SLURM_JOB_ID:-}" ]
}

# The MPI that the ranks will load, identified by its launcher: Open MPI, or MPICH and its relatives.
mpi_kind() {
    case "$(mpirun --version 2>&1 </dev/null || true)" in
        *HYDRA* | *Intel*) echo hydra ;;
        *) echo openmpi ;;
    esac
}

# Print the value of srun's --mpi for our MPI: PMIx for Open MPI, PMI-2 for others. False if srun does not support it.
srun_mpi() {
    local wanted=pmix
    [ "$(mpi_kind)" != hydra ] || wanted=pmi2
    # grep -c reads all of the output; grep -q would stop at the first match, and srun would fail on a closed pipe.
    [ "$(srun --mpi=list 2>&1 </dev/null | grep -cw "$wanted")" -gt 0 ] && echo "$wanted"
}

# If a rank dies, the remaining ranks wait for it in MPI, so the step must end 10 s later. kill-on-bad-exit would end
# it immediately and kill ranks that are about to end with a meaningful exit code, which would be lost. Since Slurm
# 22.05 a step no longer inherits the processors per task from the job.
by_srun() {
    local mpi=${DLION_SRUN_MPI:-}
    [ -n "$mpi" ] || mpi=$(srun_mpi) || {
        say "this srun does not support PMIx (srun --mpi=list): set DLION_LAUNCH=mpirun in jobs/site.sh"
        exit 2
    }
    launch=(srun --mpi="$mpi" --kill-on-bad-exit=0 --wait=10)
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    [ "${SLURM_HET_SIZE:-1}" = 1 ] || launch+=(--het-group="0-$((SLURM_HET_SIZE - 1))")
}

# mpirun gets the nodes from Slurm inside a job, and from DLION_HOSTFILE otherwise. A rank has several threads and
# must not be bound to one core.
by_mpirun() {
    if [ "$(mpi_kind)" = hydra ]; then
        launch=(mpirun -bind-to none -n "${SLURM_NTASKS:-$DLION_RANKS}")
        in_job || [ -z "$DLION_HOSTFILE" ] || launch+=(-f "$DLION_HOSTFILE")
        return
    fi
    # With the full path, Open MPI also finds itself on the other nodes. It runs as root only with an option.
    launch=("$(command -v mpirun)" --bind-to none)
    [ "$(id -u)" != 0 ] || launch+=(--allow-run-as-root)
    if in_job; then
        [ "${SLURM_HET_SIZE:-1}" = 1 ] || by_mpirun_over_components
        return
    fi
    launch+=(-n "$DLION_RANKS")
    if [ -n "$DLION_HOSTFILE" ]; then
        launch+=(--hostfile "$DLION_HOSTFILE" -x PATH -x PYTHONPATH)
    else
        launch+=(--oversubscribe)
    fi
}

# Open MPI sees only the first component, so it gets a list of all nodes and reaches them through an agent.
by_mpirun_over_components() {
    local group nodes slots hosts=${TMPDIR:-/tmp}/dlion-hosts-$SLURM_JOB_ID
    for ((group = 0; group < SLURM_HET_SIZE; group++)); do
        nodes=SLURM_JOB_NODELIST_HET_GROUP_$group slots=SLURM_NTASKS_PER_NODE_HET_GROUP_$group
        scontrol show hostnames "${!nodes}" | sed "s/\$/ slots=${!slots:-1}/"
    done >"$hosts"
    launch+=(--hostfile "$hosts" --prtemca ras ^slurm --prtemca plm ssh --prtemca plm_ssh_no_tree_spawn 1)
    launch+=(--prtemca plm_ssh_agent "bash $PWD/jobs/het-agent.sh")
}

launch=()
case "$DLION_LAUNCH" in
    srun) if in_job; then by_srun; else by_mpirun; fi ;;
    mpirun) by_mpirun ;;
    auto) if in_job && srun_mpi >/dev/null; then by_srun; else by_mpirun; fi ;;
    *)
        say "DLION_LAUNCH=$DLION_LAUNCH is unknown: choose srun, mpirun or auto in jobs/site.sh"
        exit 2
        ;;
esac
# Additional options of srun or mpirun, such as DLION_LAUNCH_OPTIONS="--cpu-bind=cores".
read -ra more_words <<<"${DLION_LAUNCH_OPTIONS:-}"
launch+=("${more_words[@]}" "${in_image[@]}")

# Part of output names: different for every job, and unchanged when a job is requeued.
# shellcheck disable=SC2034
run_id=${SLURM_JOB_ID:-$(date -u +%Y%m%dT%H%M%SZ)}

# submit_runs SCRIPT RUN... -- [OPTIONS OF dlion train]: submit an array job with a task per run (its number is in
# SLURM_ARRAY_TASK_ID), and a second job that writes the report even if runs fail. Prints both job numbers.
submit_runs() {
    local script=$1 runs=() array report more
    shift
    while [ "$1" != -- ]; do
        runs+=("$1")
        shift
    done
    shift
    read -ra more <<<"${DLION_SBATCH:-}"
    array=$(sbatch --parsable --array="0-$((${#runs[@]} - 1))%${DLION_AT_ONCE:-1}" "${more[@]}" "$script" "$@")
    report=$(sbatch --parsable --dependency="afterany:$array" jobs/report.sh "$DLION_FOLDER" "${runs[@]}")
    say "${#runs[@]} runs are job $array, the report $DLION_FOLDER/report.html is job $report"
    echo "$array $report"
}

# one_run NAME COMMAND...: do one of several runs. Adds --out to the command, and keeps the result next to that folder
# if the run succeeds.
one_run() {
    local name=$1
    shift
    mkdir -p "$DLION_FOLDER"
    say "run $name"
    "${launch[@]}" "$@" --out "$DLION_FOLDER/$name" | tee "$DLION_FOLDER/$name.part"
    mv "$DLION_FOLDER/$name.part" "$DLION_FOLDER/$name.json"
}

say "${SLURM_JOB_ID:+job $SLURM_JOB_ID, }machine $DLION_MACHINE: ${launch[*]}"
