def write(options, table, missing, load, seconds):
    from .samples import percentile as p
    for (op, subject), v in table.values.items():
        print(f"{op:16} {subject:28} n={len(v):5} p50={p(v,.5):9.2f} p99={p(v,.99):9.2f}")
    print(missing, load, seconds)
