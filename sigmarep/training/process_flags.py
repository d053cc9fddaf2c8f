"""The flags of a command that may be one of several processes; without JAX, so that a wrong flag does not wait for it."""

from absl import flags

# A process that dies ends the others after this many seconds at the latest; on CPU and GPU their next collective often
# fails before that.
HEARTBEAT_SECONDS = 60
MODES = ("auto", "on", "off")


def define() -> None:
    """Defines --distributed and what belongs to it."""
    flags.disclaim_key_flags()
    flags.DEFINE_enum(
        "distributed",
        "auto",
        MODES,
        "Whether this process is one of several. auto: where a coordinator is named, or on a TPU slice of several hosts, "
        "or under Slurm or MPI with several tasks.",
    )
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0; else JAX_COORDINATOR_ADDRESS, or the cluster's.")
    flags.DEFINE_integer("num_processes", None, "Processes; else JAX_NUM_PROCESSES, or the cluster's.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "From 0; else JAX_PROCESS_ID, or the cluster's.", lower_bound=0)
    flags.DEFINE_integer("distributed_timeout", 25, "Seconds that the processes wait for each other.", lower_bound=1)
    flags.DEFINE_integer(
        "heartbeat_timeout",
        HEARTBEAT_SECONDS,
        "Seconds without a sign of life after which a process counts as dead, and the others end.",
        lower_bound=5,
    )
