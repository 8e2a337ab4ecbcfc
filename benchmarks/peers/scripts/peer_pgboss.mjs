// pg-boss: a job queue that polls (every half a second at best), with a batch in flight for each of its workers.
import { DSN, SETTINGS, fromEnvironment, main } from "./peerscript.mjs";

const PgBoss = fromEnvironment("pg-boss");
const { batchSize, pollingIntervalSeconds, workers } = SETTINGS;
const done = "select count(*) from pgboss.job where name = 'bench' and state = 'completed'";
const fill = (column, value) => `
  insert into pgboss.job (name, data${column})
  select 'bench', jsonb_build_object('i', g)${value} from generate_series({first}, {last}) g`;

const about = {
  version: fromEnvironment("pg-boss/package.json").version,
  done: { noop: done, padded: done }, // a failure fails the whole batch that a handler was given
  table: "pgboss.job",
  fill: fill("", ""),
  delayed: fill(", start_after", ", now() + interval '1 day'"),
  bulk: true,
};

async function open(role) {
  const boss = new PgBoss({ connectionString: DSN, schedule: false, supervise: role === "worker" });
  boss.on("error", (error) => console.error(String(error)));
  await boss.start();
  return {
    setup: () => boss.createQueue("bench"),
    enqueue: (_, i, padding) => boss.send("bench", { i, padding }),
    enqueueMany: (_, numbers, padding) => boss.insert(numbers.map((i) => ({ name: "bench", data: { i, padding } }))),
    work: async (hit, begin) => {
      await begin();
      const options = { batchSize, pollingIntervalSeconds };
      const handle = async (jobs) => { for (const job of jobs) hit(job.data.i); };
      for (let number = 0; number < workers; number++) await boss.work("bench", options, handle);
      await new Promise(() => {});
    },
  };
}

await main(about, open);
