def write(out):
    return out / "report.html"
