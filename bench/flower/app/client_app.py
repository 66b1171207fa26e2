"""A site of the paper: it gets parameters, trains its share of the round, and sends all parameters back."""

from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from task import WEIGHT, load_config, load_job, train_round

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    job, site = load_job(context), int(context.node_config["site"])
    arrays = message.content["arrays"]
    if job["mode"] == "echo":
        if job["differ"]:  # as trained parameters do
            arrays = ArrayRecord({k: Array(a.numpy() * (1.0 + 0.001 * (site + 1))) for k, a in arrays.items()})
        did = {WEIGHT: 1, "site": site}
    else:
        arrays, did = train_round(load_config(job), arrays, message.content["config"]["server-round"] - 1, site)
    return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord(did)}), reply_to=message)
