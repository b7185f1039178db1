#!/bin/sh
# Give each process its rights on the topic: apply-kafka-acls.sh BOOTSTRAP PREFIX ADMIN.properties [USER_PREFIX]
# It calls kafka-acls.sh, which must be in PATH, for every line of kafka-acls.csv. Users are called USER_PREFIX and
# the process: `gateway`, `projector`, `replay`, `migrate`, `verify`, `subscriber`.
set -eu
bootstrap=$1 prefix=$2 admin=$3 user_prefix=${4-}
tail -n +2 "$(dirname "$0")/kafka-acls.csv" | while IFS=, read -r process resource pattern name operations; do
  set --
  for operation in $operations; do set -- "$@" --operation "$operation"; done
  kafka-acls.sh --bootstrap-server "$bootstrap" --command-config "$admin" --add \
    --allow-principal "User:$user_prefix$process" --"$resource" "$prefix${name#PREFIX}" \
    --resource-pattern-type "$pattern" "$@"
done
