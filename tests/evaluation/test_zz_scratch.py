import sys, time
from conftest import *
from mmgraph.cli import main, train_main
def test_x(graph, tmp_path):
    pairs=[(f"{a:03d}",f"{a+12:03d}") for a in range(12)]
    d=pd.DataFrame(pairs*16, columns=["src_id","dst_id"]); d.to_csv(tmp_path/"edges.csv", index=False)
    d[:12].to_csv(tmp_path/"eval.csv", index=False)
    f=[f"--edges={tmp_path/'edges.csv'}", f"--eval_edges={tmp_path/'eval.csv'}"]
    for i,(lr,extra) in enumerate([("3e-3",["--false_negatives=mask_neighbors"]),("3e-3",["--graph_loss_weight=5","--max_grad_norm=1"]),("1e-2",["--max_grad_norm=1","--false_negatives=mask_neighbors"]),("1e-3",["--false_negatives=mask_neighbors"])]):
        t=time.time(); c=time.process_time(); assert train_main(settings(graph, tmp_path/f"r{i}", *f, f"--max_steps=32",f"--learning_rate={lr}","--eval_every=8", *extra)) == 0; print("train", time.time()-t, time.process_time()-c)
        print([round(r["loss_graph"],3) for r in read_metrics(tmp_path/f"r{i}") if "loss" in r])
