import sys, time
from conftest import *
from mmgraph.cli import main, train_main
def test_x(graph, tmp_path):
    e = pd.read_csv(graph/"edges.csv", dtype=str)
    e[:48].to_csv(tmp_path/"edges.csv", index=False)
    e[:16].to_csv(tmp_path/"eval.csv", index=False)
    f=[f"--edges={tmp_path/'edges.csv'}", f"--eval_edges={tmp_path/'eval.csv'}"]
    for i,(lr,n,extra) in enumerate([("1e-9",4,[]),("1e-9",4,["--false_negatives=mask_neighbors"]),("3e-3",60,[]),("1e-2",60,["--false_negatives=mask_neighbors"]), ("1e-2",30,[])]):
        t=time.time(); assert train_main(settings(graph, tmp_path/f"r{i}", *f, f"--max_steps={n}",f"--learning_rate={lr}", *extra)) == 0; print("train", time.time()-t)
        print([round(r["loss_graph"],3) for r in read_metrics(tmp_path/f"r{i}") if "loss" in r], [r.get("chance_graph") for r in read_metrics(tmp_path/f"r{i}")][:5])
