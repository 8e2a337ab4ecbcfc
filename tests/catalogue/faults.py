"""The catalogue of faults, 1 to 95 in order: (fault, expected)."""

Rows = list[tuple[str, str]]

WORKERS: Rows = [
    ("killed before the claim commits", "nothing is claimed; the next worker takes it at once"),
    (
        "killed after the claim commits, before its reply is read",
        "claimed again after the lease; one crash, no attempt",
    ),
    ("the claim's reply is lost, the worker lives", "leases it does not know of are given back"),
    ("killed between claim and handler", "claimed again after the lease; one crash, no attempt"),
    ("killed inside a step's body", "the body runs again; one record"),
    ("killed between body and record", "the body runs again; one record"),
    ("the record is committed, its reply lost", "the value is replayed; the body does not run again"),
    ("killed between two steps", "the first is not repeated"),
    ("killed inside a transaction, before its commit", "no effect, then one"),
    ("a transaction is committed, its reply lost", "one effect"),
    ("killed between the handler's return and the settle", "replayed over what is recorded; settled once"),
    ("a settle is committed, its reply lost, and sent again", "the second finds it done and changes nothing"),
    ("parking with a new child: before the commit, or its reply lost", "no child; or one child and a waiting parent"),
    ("a child's end: before the commit, or its reply lost", "the child runs again; or the parent is woken once"),
    ("killed while a sleep or a wait for an event is registered", "one sleep, long enough; the event is not lost"),
    ("killed during a graceful stop", "grace time, then released at no cost; no overlap before that"),
    ("second SIGTERM or SIGINT, SIGHUP, SIGPIPE on stdout", "a faster stop; no loop of crashes"),
    ("all workers killed at once and started again", "all work goes on; no slot is lost"),
    ("killed while holding permits of a limit", "permits come back by lease and sweep"),
    ("killed in the middle of a batch of results", "what is stored stays; the rest is done again"),
    ("whoever sweeps and fires schedules is killed", "another takes over; nothing fires twice"),
    ("the parent of a process pool dies, its children do not", "orphans end, and are fenced in any case"),
]
ZOMBIES: Rows = [
    ("stopped for longer than its lease, its work finished by another, then continued", "every late write is refused"),
    ("the same, while the other one still runs", "step, beat and settle are refused; no permit is freed"),
    ("the same, but nobody has taken the work over", "one rule: it gives the work back at no cost"),
    ("a handler blocks the event loop for longer than a lease", "beats go on by themselves; the block is reported"),
    ("a handler never returns", "its timeout ends the attempt and frees the slot; a process is replaced"),
    (
        "the connection for beats is dead and the one for work alive, or the reverse",
        "the worker stops before its lease",
    ),
    ("two processes under one worker's name", "fenced by an id drawn at each start"),
]
POSTGRES: Rows = [
    ("restarts of all kinds and kills of the server, again and again", "all converges; nothing accepted is lost"),
    ("single sessions killed or terminated, at random", "reconnected; the outcome is taken as unknown"),
    ("a standby is promoted", "synchronous: nothing lost; asynchronous: the last commits only, zombies fenced"),
    ("connected to a read-only standby", "a clear error; other hosts are tried"),
    ("low statement, lock and idle-in-transaction timeouts", "tried again with back-off; nothing half done"),
    ("deadlocks", "none among the engine's functions; one from outside is tried again"),
    ("another default isolation level of the role", "everything works at any level"),
    ("the disk is full", "nothing is acknowledged; work goes on once there is space"),
    ("no connection is to be had", "bounded waits; beats have a connection of their own; no claim without beats"),
    ("a long snapshot, or an exclusive lock on the engine's tables", "waits are bounded; all recovers"),
    ("vacuum off, REINDEX under load", "correct, if slower"),
    ("the database's clock jumps by an hour", "leases end early and fenced, or late; no tick fires twice"),
    ("no extension, no superuser; other versions, encodings and collations", "installs; SQL_ASCII is refused"),
    ("an old backup or a dump is restored", "old claims are void; no id is used twice"),
]
NETWORK: Rows = [
    ("reset, black hole, half open, slow", "every wait has an end; nothing is settled twice"),
    ("the reply of every k-th commit is lost", "every write can be repeated"),
    ("some workers are cut off for longer than a lease", "as any zombie"),
    ("notifications are lost", "polling alone finds the work"),
    ("a pooler in transaction mode", "no session state is needed"),
    ("host switched, TLS error, password changed", "back-off; what cannot mend is shown; no tight loop"),
]
CLOCKS: Rows = [
    ("the worker's clock is wrong, jumps or stands", "no effect on ticks, leases or retries"),
    ("daylight saving, odd zones, zones that are gone", "ticks by rule, over ten years and all zones"),
    ("nobody fires schedules for a minute or a day", "missed ticks by the schedule's policy"),
    ("two fire a tick at once", "one execution a tick"),
    ("a schedule is changed, paused or removed while it fires", "no old chain; the right payload"),
    ("rare days, far years, nonsense expressions", "the right tick, or refused when registered"),
]
DATA: Rows = [
    (
        "U+0000 and lone surrogates, anywhere",
        "refused with the path; in results the execution fails alone; errors escaped",
    ),
    ("NaN, huge numbers, sets, dates, enums and the like", "the same value back, or refused"),
    ("0, empty text, false, empty list and object, null", "come back equal"),
    ("values around and far over 1 MiB", "refused before the database is asked"),
    ("deep nesting, circles, objects and errors that misbehave", "fails alone; the worker lives"),
    ("hostile and strange names", "accepted and distinct, or refused"),
    ("numbers and instants out of range", "exact, or refused"),
    ("a payload that looks like the engine's own data", "plain data"),
]
HANDLERS: Rows = [
    (
        "a handler ends its process, or raises what ends one",
        "its crashes are counted, then WorkerLost; neighbours live",
    ),
    ("a handler catches everything around a wait or a cancel", "further calls are refused and the run ends"),
    ("one name twice, nested steps, a context used where it must not be", "refused; never another step's value"),
    ("steps reordered, renamed, removed or of another kind", "nothing lost; goes on when the code is put right"),
    (
        "a task is gone, or deployments differ in what they declare",
        "its work stays and is shown; nobody deletes others'",
    ),
    ("tasks, threads, connections and variables left behind", "reported; nothing crosses between executions"),
    ("cancel at any moment, twice, too late, anywhere in a tree", "never completed once accepted"),
    ("ten thousand executions fail at once", "retries are spread; healthy work goes on between them"),
]
SCALE: Rows = [
    ("many children, many delayed, many waiting", "claims stay as cheap; the parent wakes once"),
    ("recursion without end", "refused below depth 100, with the chain shown"),
    ("parent and child under one limit of one", "no deadlock: who waits holds nothing"),
    ("a queue is paused with work of every kind", "starts nothing; what runs ends; nothing is lost"),
    ("pruning beside live trees, and killed", "no part of a tree goes before its root"),
    ("many workers and installers start at once", "one schema; no collision"),
]
MIGRATIONS: Rows = [
    ("an installer is killed at each statement; a lock is held", "run again; writers wait no longer than two seconds"),
    ("two releases work side by side, up and down", "no failure from the upgrade"),
    ("older code on a newer schema, newer code on an older one, dead workers", "works as stated or refuses clearly"),
]
ATTACKS: Rows = [
    ("SQL in names and arguments", "parameters and quoted names only"),
    ("SQL in the condition of a row trigger", "the writer's rights; nobody gains any"),
    ("a condition that raises; tables changed, renamed, dropped, huge", "the writer goes on; the error is recorded"),
    ("every role against every table and function", "exactly the rights that are listed"),
    ("objects that shadow the engine's", "no effect"),
    ("an enqueuer forges claims, ids and parents", "refused"),
    ("a session's settings", "none moves time, owner or state"),
    ("code in payloads or names", "never imported"),
    ("the dashboard without login, guessed passwords, fixed sessions", "refused; limited; safe cookies"),
    ("forged requests, frames, other origins and hosts", "refused"),
    ("markup and control sequences in stored text", "text only"),
    ("paths, sizes, slow requests, costly searches", "bounded"),
    ("secrets in payloads, addresses and tracebacks", "never shown"),
    ("lines and labels injected", "escaped and bounded"),
    ("dependencies", "few, pinned, audited"),
]

GROUPS: dict[str, Rows] = {
    "F1 Worker processes": WORKERS,
    "F2 Zombies and slow workers": ZOMBIES,
    "F3 Postgres": POSTGRES,
    "F4 Network and pooling": NETWORK,
    "F5 Clocks and schedules": CLOCKS,
    "F6 Data": DATA,
    "F7 Handlers and changed code": HANDLERS,
    "F8 Scale and shape": SCALE,
    "F9 Migrations": MIGRATIONS,
    "F10 Security": ATTACKS,
}
