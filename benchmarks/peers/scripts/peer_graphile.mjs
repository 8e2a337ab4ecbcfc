// graphile-worker: a job queue, LISTEN/NOTIFY wake-up, with its local queue and batched completion switched on.
import { DSN, SETTINGS, fromEnvironment, main } from "./peerscript.mjs";

const { Logger, makeWorkerUtils, run } = fromEnvironment("graphile-worker");
const logger = new Logger(() => (level, message) => { if (level === "error") console.error(message); });
const { concurrentJobs, localQueue, completeJobBatchDelay, maxPoolSize } = SETTINGS;
const done = "select {count} - count(*) from graphile_worker._private_jobs";
const fill = (column, value) => `
  insert into graphile_worker._private_jobs (task_id, payload${column})
  select (select id from graphile_worker._private_tasks where identifier = 'noop'), json_build_object('i', g)${value}
  from generate_series({first}, {last}) g`;

const about = {
  version: fromEnvironment("graphile-worker/package.json").version,
  done: { noop: done, padded: done }, // the backoff of a failed job is fixed, and begins at seconds
  table: "graphile_worker._private_jobs",
  fill: fill("", ""),
  delayed: fill(", run_at", ", now() + interval '1 day'"),
  bulk: true,
};

async function open() {
  const utils = await makeWorkerUtils({ connectionString: DSN, logger });
  return {
    setup: async () => {
      await utils.migrate();
      const job = await utils.addJob("noop", { i: 0 }); // makes the row of the task
      await utils.completeJobs([job.id]);
    },
    enqueue: (kind, i, padding) => utils.addJob(kind, padding ? { i, padding } : { i }),
    enqueueMany: (kind, numbers, padding) =>
      utils.addJobs(numbers.map((i) => ({ identifier: kind, payload: padding ? { i, padding } : { i } }))),
    work: async (hit, begin) => {
      await begin();
      const noop = async (payload) => hit(payload.i);
      const worker = {
        connectionString: DSN, concurrentJobs, maxPoolSize, pollInterval: 1000, localQueue: { size: localQueue },
        completeJobBatchDelay, failJobBatchDelay: completeJobBatchDelay,
      };
      const runner = await run({ preset: { worker }, logger, taskList: { noop, padded: noop } });
      await runner.promise;
    },
  };
}

await main(about, open);
