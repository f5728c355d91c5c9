# Before vLLM is stopped: no new turns are sent here any more, so wait for the running ones to end.
import re
import sys
import time
import urllib.request

time.sleep(5)
end = time.monotonic() + float(sys.argv[1]) - 5
unheard = 0
while time.monotonic() < end and unheard < 3:
    try:
        page = urllib.request.urlopen("http://127.0.0.1:8000/metrics", timeout=20).read().decode()
    except OSError:
        unheard += 1
    else:
        unheard = 0
        counts = re.findall(r"(?m)^vllm:num_requests_(?:running|waiting)(?:\{.*\})? (\S+)$", page)
        if not any(float(count) for count in counts):
            break
    time.sleep(2)
