"""Ends of flows by SimGrid, run by the Python that has Debian's python3-simgrid; JSON in, JSON out.

In: [{"capacities": {link: bytes/s}, "flows": [[wait_s, [links], bytes, [after]]]}]. Out: a list of
ends in s for each case. A flow starts wait_s after the flows in `after` (it may be left out) ended. All
cases run side by side in one simulation, where they share nothing. SimGrid's model of TCP is switched
off, so that rates are max-min fair shares of the capacities.
"""

import json
import sys

PLAIN = (
    "network/model:CM02 network/crosstraffic:0 network/TCP-gamma:0 network/latency-factor:1 "
    "network/bandwidth-factor:1 network/weight-S:0 network/loopback-lat:0"
)


def main():
    """Read the cases, simulate them together, write when their flows end."""
    sys.path.insert(0, "/usr/lib/python3/dist-packages")
    from simgrid import Actor, Comm, Engine, LinkInRoute, NetZone, this_actor

    cases = json.load(sys.stdin)
    engine = Engine(["flows", "--log=root.thresh:critical", *("--cfg=" + c for c in PLAIN.split())])
    zone = NetZone.create_full_zone("all")
    ends = [[0.0] * len(case["flows"]) for case in cases]
    for c, case in enumerate(cases):
        links = {
            name: zone.create_link(f"{c}-{name}", float(capacity)).seal()
            for name, capacity in case["capacities"].items()
        }
        actors = []
        for f, (wait_s, path, num_bytes, *after) in enumerate(case["flows"]):
            before = [actors[i] for needed in after for i in needed]
            hosts = [zone.create_host(f"{c}-{f}-{end}", 1e9) for end in "ab"]
            for host in hosts:
                host.seal()
            route = [LinkInRoute(links[name]) for name in path]
            zone.add_route(hosts[0].netpoint, hosts[1].netpoint, None, None, route, False)

            def run(c=c, f=f, wait_s=wait_s, num_bytes=num_bytes, hosts=hosts, before=before):
                for actor in before:
                    actor.join()
                this_actor.sleep_for(wait_s)
                Comm.sendto(hosts[0], hosts[1], int(num_bytes))
                ends[c][f] = engine.clock

            actors.append(Actor.create(f"{c}-{f}", hosts[0], run))
    zone.seal()
    engine.run()
    json.dump(ends, sys.stdout)


if __name__ == "__main__":
    main()
