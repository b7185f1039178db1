"""The sequencer: takes requests from a queue, decides them in batches, appends their events, and answers.

Both logs append through it. Its words, in the order in which a request meets them:

- A *request* is a command or a question, with the future that its caller awaits. A question appends nothing: an
  `IngestCheck` asks whether files would be accepted, an `EndQuestion` where the partition ends.
- A *batch* is what one transaction takes from the queue. A *run* is the part of a batch that adds files to one package,
  and is decided together.
- A *lease* is the right to append to the partition, with the state read from it. A *take-over* obtains a lease. Every
  failure ends the lease, and the next take-over reads from the log what has happened.
- A *proof* shows that no other process has appended anything. A commit is one. Refusals rest on the state alone, so
  they are not answered before a proof.
- A request is *held* while a background job works on its large package.

Begin with `partition_writer`, one thread for each partition. `queue` holds the requests that wait, their deadlines, and
the errors that answer them. `driver` is the port to a log: it gives leases and appends under them. `background` loads
large packages and stores large manifests in separate threads. The sequencer imports the log's `port`, `records` and
`state`, and nothing of Kafka or SQLite.
"""
