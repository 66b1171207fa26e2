#!/bin/sh
# One site as a Kubernetes Job, created under a name of its own (a second one of that name is refused):
#   sh examples/kubernetes.sh JOB SITE RANKS RUN
# Before: an image of this repository with its .venv; the config as ConfigMap `curtail-config` (key config.yaml, with sync.host and
# sync.port of the head node); the token shards on a volume claim `curtail-data`; and of each site only its own key:
#   kubectl create secret generic curtail-keys-SITE --from-file=runs/RUN/keys/coordinator.key --from-file=runs/RUN/keys/SITE.key_secret
# (in a secret's name underscores become dashes)
set -eu
job=$1 site=$2 ranks=$3 run=$4
kubectl create --filename=- <<END
apiVersion: batch/v1
kind: Job
metadata:
  name: $job
  labels: {app: curtail}
spec:
  backoffLimit: 0                  # the coordinator decides about restarts
  template:
    metadata:
      labels: {app: curtail}
    spec:
      restartPolicy: Never
      terminationGracePeriodSeconds: 30    # a site asked to go leaves its round within 20 s
      nodeSelector: {curtail/site: $site}
      containers:
        - name: site
          image: registry.example.org/curtail:latest
          workingDir: /curtail
          env: [{name: OMP_NUM_THREADS, value: "1"}, {name: PYTHONUNBUFFERED, value: "1"}]
          command: [.venv/bin/torchrun, --standalone, --nproc_per_node=$ranks, train.py, /config/config.yaml, run=$run,
                    sites.$site.ranks=$ranks, site=$site]
          resources: {limits: {nvidia.com/gpu: $ranks}}
          volumeMounts:
            - {name: config, mountPath: /config}
            - {name: keys, mountPath: /curtail/runs/$run/keys, readOnly: true}
            - {name: data, mountPath: /curtail/data}
            - {name: shm, mountPath: /dev/shm}     # the ranks' NCCL wants more of it than the 64 MiB that a container has
      volumes:
        - {name: config, configMap: {name: curtail-config}}
        - {name: keys, secret: {secretName: curtail-keys-$(echo "$site" | tr _ -), defaultMode: 0400}}
        - {name: data, persistentVolumeClaim: {claimName: curtail-data}}
        - {name: shm, emptyDir: {medium: Memory}}
END
