# shellcheck shell=bash
# What every script in jobs/ begins with: the site's settings, an environment that has dlion, and `launch`, the words
# that start one process per task, to be put before a command:
#
#   "${launch[@]}" dlion train ...
#
# Inside a Slurm job they are srun or mpirun (DLION_LAUNCH=srun|mpirun|auto), outside of one mpirun. To be sourced from
# the root of the checkout.

set -euo pipefail
say() {
    printf 'jobs: %s\n' "$*" >&2
}

# shellcheck source=jobs/site.sh
source jobs/site.sh

if [ ! -f "env/machines/$DLION_MACHINE.sh" ]; then
    say "DLION_MACHINE=$DLION_MACHINE is unknown: choose a file of env/machines, without its .sh, in jobs/site.sh"
    exit 2
fi
# Sets in_image, the words that run a command in a container: none, where there is none.
# shellcheck source=env/machines/checkout.sh
source "env/machines/$DLION_MACHINE.sh"

in_job() {
    [ -n "${SLURM_JOB_ID:-}" ]
}

# The kind of MPI that ranks will load, by its launcher: Open MPI, or MPICH and its kin.
mpi_kind() {
    case "$(mpirun --version 2>&1 </dev/null || true)" in
        *HYDRA* | *Intel*) echo hydra ;;
        *) echo openmpi ;;
    esac
}

# What srun's --mpi calls that which our MPI understands: PMIx for Open MPI, PMI-2 for the others. False if srun cannot.
srun_mpi() {
    local wanted=pmix
    [ "$(mpi_kind)" != hydra ] || wanted=pmi2
    # All of the answer is read: grep -q would leave at the first match, and srun would fail to write the rest.
    [ "$(srun --mpi=list 2>&1 </dev/null | grep -cw "$wanted")" -gt 0 ] && echo "$wanted"
}

# If a rank dies, the others wait for it in MPI, so 10 s after it the step has to end. Not at once (kill-on-bad-exit):
# ranks that end together, with an exit code that says why, would be killed on the last metre, and the code be lost. And
# since Slurm 22.05 a step no longer takes over the job's processors per task by itself.
by_srun() {
    local mpi=${DLION_SRUN_MPI:-}
    [ -n "$mpi" ] || mpi=$(srun_mpi) || {
        say "this srun does not speak PMIx (srun --mpi=list): set DLION_LAUNCH=mpirun in jobs/site.sh"
        exit 2
    }
    launch=(srun --mpi="$mpi" --kill-on-bad-exit=0 --wait=10)
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    [ "${SLURM_HET_SIZE:-1}" = 1 ] || launch+=(--het-group="0-$((SLURM_HET_SIZE - 1))")
}

# Inside a job mpirun learns the nodes from Slurm, elsewhere from DLION_HOSTFILE. A rank is several threads, so it must
# not be bound to one core.
by_mpirun() {
    if [ "$(mpi_kind)" = hydra ]; then
        launch=(mpirun -bind-to none -n "${SLURM_NTASKS:-$DLION_RANKS}")
        in_job || [ -z "$DLION_HOSTFILE" ] || launch+=(-f "$DLION_HOSTFILE")
        return
    fi
    # By its full path, Open MPI also finds itself on the other nodes. Root has to say that it means it.
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

# Open MPI takes the first component for the whole job, so it is told all nodes, and reaches them by an agent.
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
# More words for srun or mpirun, such as DLION_LAUNCH_OPTIONS="--cpu-bind=cores".
read -ra more_words <<<"${DLION_LAUNCH_OPTIONS:-}"
launch+=("${more_words[@]}" "${in_image[@]}")

# Part of the name of what a script writes: new for every job, and the same again when it is queued again.
# shellcheck disable=SC2034
run_id=${SLURM_JOB_ID:-$(date -u +%Y%m%dT%H%M%SZ)}

# submit_runs SCRIPT RUN... -- [OPTIONS OF dlion train]: an array job with a task per run, its number in
# SLURM_ARRAY_TASK_ID, and a job after it that makes the report, also if runs fail. Prints both jobs' numbers.
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

# one_run NAME COMMAND...: a run of several; the command gets an --out, and its result stands beside that once it has
# ended well.
one_run() {
    local name=$1
    shift
    mkdir -p "$DLION_FOLDER"
    say "run $name"
    "${launch[@]}" "$@" --out "$DLION_FOLDER/$name" | tee "$DLION_FOLDER/$name.part"
    mv "$DLION_FOLDER/$name.part" "$DLION_FOLDER/$name.json"
}

say "${SLURM_JOB_ID:+job $SLURM_JOB_ID, }machine $DLION_MACHINE: ${launch[*]}"
