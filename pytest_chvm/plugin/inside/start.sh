# The end of a script that starts a pytest in the guest and gives its first answer. Before it come chvm_directory, chvm_job, the
# environment, and its words as the shell's arguments.
set -e
umask 077
mkdir $chvm_directory
mkfifo $chvm_directory/ask $chvm_directory/answer
printf %s "$chvm_job" >$chvm_directory/job
(
    exec 3<>$chvm_directory/ask </dev/null >/dev/null 2>&1
    chvm_own=$chvm_directory
    unset chvm_directory chvm_job
    "$@" $chvm_own >$chvm_own/out 2>&1 3>&- && status=0 || status=$?
    # Whoever waits for an answer is told.
    while :; do
        echo "{\"ended\": $status}" >$chvm_own/answer
        read -r asked <&3
    done
) &
exec cat $chvm_directory/answer
