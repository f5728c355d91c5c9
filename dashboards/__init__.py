"""Grafana dashboards as code: `python -m dashboards` writes them where the Helm chart packs them.

Each board is a module: `fleet`, `sessions`, `kv`, `gateway`. Every panel says what it shows and
what good looks like. Labels: `job` is the scrape job of the gateway, `pod` the vLLM pod, in the
gateway's metrics and in the pods' own.
"""
