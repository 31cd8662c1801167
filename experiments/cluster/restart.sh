#!/bin/bash
# Starts a run again until it is done, after a kill, a crash, a lost process or a preemption; each start goes on from the
# newest sound checkpoint: experiments/cluster/restart.sh jaxcnn train experiments/resnet20_cifar10.py --run first
# Not after bad input (status 2) or Ctrl-C (130), and 100 times at most.
for _ in {1..100}; do
  "$@"
  status=$?
  case $status in 0 | 2 | 130) exit "$status" ;; esac
  echo "status $status: starting again" >&2
  sleep 1
done
exit "$status"
