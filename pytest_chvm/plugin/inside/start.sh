# The end of a script that starts a pytest in the guest and gives its first answer. Before it come the environment, and of what it
# is to be: chvm_directory, chvm_place (where it runs), chvm_mask, chvm_job, and its words as the shell's arguments.
set -e
umask 077
mkdir $chvm_directory
mkfifo $chvm_directory/ask $chvm_directory/answer
printf %s "$chvm_job" >$chvm_directory/job
cd "$chvm_place"
umask $chvm_mask
(
    exec 3<>$chvm_directory/ask </dev/null >/dev/null 2>&1
    chvm_own=$chvm_directory
    unset chvm_directory chvm_place chvm_mask chvm_job
    "$@" $chvm_own >$chvm_own/out 2>&1 3>&- && status=0 || status=$?
    # Whoever waits for an answer is told.
    while :; do
        echo "{\"ended\": $status}" >$chvm_own/answer
        read -r asked <&3
    done
) &
exec cat $chvm_directory/answer
