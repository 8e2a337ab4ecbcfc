"""What went wrong in an earlier engine of this kind, 1 to 50 in order: (fault there, what is the case here)."""

Rows = list[tuple[str, str]]

FENCING: Rows = [
    ("the sweep for dead workers never ran", "a killed worker's work is swept"),
    ("writes matched the id alone", "every write carries the lease; a stale one changes nothing"),
    ("a swept worker's beat registered it anew", "its beat tells it that it was declared dead"),
    ("work that kills its process looped", "crashes are counted and end in WorkerLost"),
    ("after a lost connection the first claim stayed locked", "leases that a process does not know go back"),
    ("a repeated settle failed a completed child or doubled it", "a repetition changes nothing"),
    ("SIGTERM released work that went on running", "released only once the handler has ended"),
    ("finished results waited in memory and were dropped", "flushed at once; kept until stored"),
    ("one bad result wedged its worker", "it fails alone in its batch"),
]
SETTLEMENT: Rows = [
    ("out of attempts was never failed", "fails at its last attempt, whatever is retained"),
    ("cancelling what runs rescheduled it", "ends cancelled"),
    ("a superseded run ended twice", "one end"),
    ("0, empty text and false became null", "come back equal"),
    ("a top-level result was never stored", "stored and given back"),
]
CHILDREN: Rows = [
    ("a failure reached one level", "reaches every ancestor"),
    ("cancelling a child never woke its parent", "every end wakes the parent"),
    ("cancelling a parent left its descendants running", "the whole tree is cancelled"),
    ("a child's end freed the lock of a running parent", "a running parent stays locked"),
    ("after a caught timeout the next call timed out at once", "each call has its own deadline"),
    ("a parent could not catch a child's failure", "it can"),
    ("each resume cost an attempt", "resumes are free"),
    ("a child that timed out was not told", "it is cancelled with its subtree"),
    ("a cancel that met a suspension was forgotten", "it takes effect"),
]
CLAIMING: Rows = [
    ("slots had no owner and leaked", "permits live with leases"),
    ("a zombie freed another's slot; changed limits forgot slots", "neither"),
    ("limits came from the worker's code", "the database holds them"),
    ("a batch of cancelled and live work dropped some", "all are settled"),
    ("one long handler stopped new starts", "slots fill one by one"),
    ("unknown tasks were claimed and burnt", "they stay for who knows them"),
    ("windows did not hold for two tasks, nor over midnight", "both hold"),
    ("priority ran the wrong way", "higher goes first"),
]
SCHEDULES: Rows = [
    ("ticks came from the worker's clock", "from the database's"),
    ("any start deleted schedules made at run time", "only what the same deployment declared is replaced"),
    ("a changed expression kept the old chain", "one chain"),
    ("the chain lived in the run, without zone or payload", "the schedule lives by itself"),
    ("a finished key swallowed calls, a running one was declared failed", "the key gives the same execution"),
    ("throttles let a second run in, and raised", "one a period; no error"),
]
INPUT: Rows = [
    ("a trigger's filter ran with the owner's rights", "with the writer's"),
    ("a filter's error broke the application's write", "an error of the engine never does"),
    ("names that need quotes broke, others collided", "any name is accepted and distinct, or refused"),
    ("deployments deleted each other's triggers and schedules", "each keeps its own"),
    ("a payload with an event's key was taken for one", "plain data"),
    ("queue names collided", "distinct"),
    ("a crash between two migrations broke the installation", "it goes on where it was"),
    ("the breaking migration read a column that was not there", "tested with old workers alive"),
    (
        "any newer migration stopped old workers; dead ones held it up",
        "only a breaking one does; the dead do not count",
    ),
    ("the test clock was a session's setting", "an argument"),
    ("no rights were granted or revoked", "roles with exactly what they need"),
    ("a cancel waited for a beat of 30 seconds", "told by signal at once, by the beat at the latest"),
    ("the fetch loop swallowed errors", "logged, counted, backed off"),
]

GROUPS: dict[str, Rows] = {
    "Fencing and recovery": FENCING,
    "Settlement": SETTLEMENT,
    "Children": CHILDREN,
    "Claiming and limits": CLAIMING,
    "Schedules, keys and throttles": SCHEDULES,
    "Triggers, input, migrations and rights": INPUT,
}
