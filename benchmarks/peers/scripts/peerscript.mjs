// What the JavaScript scripts of the peers share; the roles, arguments and answers are those of peerscript.py.
//
// Node cannot map a file into memory, so the marks are written out every few milliseconds: the number of runs often,
// the whole seldom, and once more when a worker has nothing new to say.
import fs from "node:fs";
import { createRequire } from "node:module";

const FLUSH_MS = 5;
const WHOLE_MS = 200;
const TICK_MS = 10;
const BATCH = 5000;
const BATCH_BYTES = 5_000_000;
const FLAT_OUT_BATCH = 100;
const FAILING_OF_TEN = 3;

export const DSN = process.env.BENCH_DSN ?? "";
export const SETTINGS = JSON.parse(process.env.BENCH_SETTINGS ?? "{}");
export const fromEnvironment = createRequire(`${process.env.BENCH_HOME}/`);
export const fails = (number, attempt) => number % 10 < FAILING_OF_TEN && attempt === 1;

const now = () => (performance.timeOrigin + performance.now()) / 1000;
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const range = (first, end) => Array.from({ length: end - first }, (_, place) => first + place);

class Marks {
  constructor(directory, number, count) {
    this.count = count;
    this.memory = Buffer.alloc(8 + 9 * count);
    this.file = fs.openSync(`${directory}/marks.${number}`, "w+");
    fs.writeSync(this.file, this.memory, 0, this.memory.length, 0);
    this.runs = this.written = this.writtenWhole = 0;
    this.wholeAt = 0;
    setInterval(() => this.flush(), FLUSH_MS);
  }

  hit(job) {
    if (!this.memory[8 + job]) this.memory.writeDoubleLE(now(), 8 + this.count + 8 * job);
    this.memory[8 + job] = Math.min(255, this.memory[8 + job] + 1);
    this.runs += 1;
  }

  flush() {
    if (this.runs === this.writtenWhole) return;
    const isDue = now() * 1000 - this.wholeAt > WHOLE_MS || this.runs === this.written;
    this.memory.writeBigUInt64LE(BigInt(this.runs), 0);
    fs.writeSync(this.file, this.memory, 0, isDue ? this.memory.length : 8, 0);
    this.written = this.runs;
    if (isDue) {
      this.writtenWhole = this.runs;
      this.wholeAt = now() * 1000;
    }
  }
}

async function enqueue(peer, kind, count, size, how) {
  const padding = "x".repeat(Number(size));
  const batch = Math.min(BATCH, Math.floor(BATCH_BYTES / Math.max(1, Number(size))));
  const beganAt = now();
  if (how === "one") for (let number = 0; number < Number(count); number++) await peer.enqueue(kind, number, padding);
  else
    for (let first = 0; first < Number(count); first += batch)
      await peer.enqueueMany(kind, range(first, Math.min(Number(count), first + batch)), padding);
  return now() - beganAt;
}

async function latency(peer, count, gap) {
  const sentAt = [];
  for (let number = 0; number < Number(count); number++) {
    sentAt.push(now());
    await peer.enqueue("noop", number, "");
    await sleep(Number(gap) * 1000);
  }
  return sentAt;
}

async function produce(peer, count, rate) {
  const sentAt = [];
  const beganAt = now();
  while (sentAt.length < Number(count)) {
    const due = Number(rate) ? Math.floor((now() - beganAt) * Number(rate)) + 1 : sentAt.length + FLAT_OUT_BATCH;
    const numbers = range(sentAt.length, Math.max(sentAt.length, Math.min(due, Number(count))));
    const at = now();
    sentAt.push(...numbers.map(() => at));
    if (numbers.length) await peer.enqueueMany("noop", numbers, "");
    if (Number(rate)) await sleep(TICK_MS - (((now() - beganAt) * 1000) % TICK_MS));
  }
  return sentAt;
}

async function worker(peer, directory, number, count) {
  const marks = new Marks(directory, number, Number(count));
  await peer.work((job) => marks.hit(job), async () => {
    fs.writeFileSync(`${directory}/ready.${number}`, "");
    while (!fs.existsSync(`${directory}/go`)) await sleep(2);
  });
}

const ROLES = { enqueue, latency, produce, worker, setup: (peer) => peer.setup() };

// about: {version, table, done, fill, delayed, bulk}; open: returns the peer, connected.
export async function main(about, open) {
  const [role, ...args] = process.argv.slice(2);
  const answer = role === "about" ? about : await ROLES[role](await open(role), ...args);
  // written to the end before leaving: a pipe takes 64 KB at once
  process.stdout.write(`${JSON.stringify(answer ?? null)}\n`, () => process.exit(0));
}
