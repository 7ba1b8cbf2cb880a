"""The chart and the manifests on a real node of Kubernetes, which is started here."""
