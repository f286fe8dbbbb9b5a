# Typed into any sh on a guest's virtio console: a loop that runs one command at a time for the host.
# Commands run in the background, so that the loop can always be told to kill; each in a cgroup of its own
# (cgroup v2 with cgroup.kill, Linux 5.14), else in a session of its own.
chvm_tmp=$(mktemp -d /run/chvm.XXXXXX 2>/dev/null || mktemp -d)
chvm_cgroup=/sys/fs/cgroup/chvm chvm_number=0 chvm_input=/dev/null
# The next command's is always there: making it takes milliseconds of an emulated guest.
mkdir -p $chvm_cgroup/1 2>/dev/null
[ -w $chvm_cgroup/cgroup.kill ] || chvm_cgroup=
chvm_open_more() { rm -f $chvm_tmp/more; mkfifo $chvm_tmp/more; exec 9<>$chvm_tmp/more; }
chvm_open_more
# An output goes in pieces, each once the host has the one before: a VMM drops what a console's reader is slow to take.
chvm_send() {
    left=$4 block=0
    printf '\n%s %s %d\n' $1 $2 $left
    while [ $left -gt 0 ]; do
        # What goes on writing to the file has no part in the answer. With one write each: of many small ones the VMM drops some.
        if [ $block = 0 ]; then
            dd if=$3 bs=$((left < 32768 ? left : 32768)) count=1
        elif [ $left -ge 32768 ]; then
            dd if=$3 bs=32768 skip=$block count=1
        else
            dd if=$3 bs=32768 skip=$block count=1 | head -c $left | cat
        fi 2>/dev/null
        left=$((left - 32768)) block=$((block + 1))
        read -r more <&9
    done
}
chvm_supervise() {
    files=$chvm_tmp/$chvm_number group=
    if [ "$chvm_cgroup" ]; then
        group=$chvm_cgroup/$chvm_number
        [ -d $group ] || mkdir $group 2>/dev/null || [ -d $group ] || group=
    fi
    : >$files.out; : >$files.err
    # Not empty while there is something to kill.
    echo - >$files.pid
    (
        [ "$group" ] && echo 0 >$group/cgroup.procs
        unset chvm_tmp chvm_cgroup chvm_number chvm_input chvm_token
        exec setsid sh -c "$2" 9>&-
    ) <$chvm_input >$files.out 2>$files.err &
    echo $! >$files.pid
    wait $!
    status=$?
    # Of both at once, since each process takes milliseconds of an emulated guest: size, name, size, name, and their sum.
    if [ -s $files.out ] || [ -s $files.err ]; then
        set -- $1 $(wc -c $files.out $files.err)
    else
        set -- $1 0 $files.out 0 $files.err
    fi
    chvm_send $1 out $3 $2
    chvm_send $1 err $5 $4
    : >$files.pid
    printf '\n%s end %d\n' $1 $status
    rm -f $files.*
    if [ "$group" ]; then
        rmdir $group
        mkdir $chvm_cgroup/$((chvm_number + 1))
    fi 2>/dev/null
}
chvm_kill() {
    if [ "$chvm_cgroup" ]; then
        echo 1 >$chvm_cgroup/$chvm_number/cgroup.kill
    else
        kill -KILL -$(cat $chvm_tmp/$chvm_number.pid)
    fi 2>/dev/null
}
chvm_loop() {
    printf '\n%s loop\n' $1
    while IFS=' ' read -r chvm_op chvm_token chvm_rest; do
        case $chvm_op in
        run)
            chvm_number=$((chvm_number + 1))
            case $chvm_rest in
            *\\*) chvm_command=$(printf '%b.' "$chvm_rest") && chvm_rest=${chvm_command%.} ;;
            esac
            chvm_supervise $chvm_token "$chvm_rest" &
            chvm_job=$! chvm_input=/dev/null
            ;;
        input)
            if [ $chvm_input = /dev/null ]; then
                chvm_input=$chvm_tmp/$((chvm_number + 1)).in
                : >$chvm_input
            fi
            head -c $chvm_rest >>$chvm_input
            printf '\n%s input\n' $chvm_token
            ;;
        more) echo >&9 ;;
        do) eval "$chvm_rest" </dev/null >/dev/null 2>&1 ;;
        kill) chvm_kill ;;
        drop)
            # The host has given the command up, its answer too. What one that has ended left running goes on.
            [ -s $chvm_tmp/$chvm_number.pid ] && chvm_kill
            kill -KILL $chvm_job 2>/dev/null && wait $chvm_job 2>/dev/null
            chvm_open_more
            chvm_input=/dev/null
            ;;
        # What the host says when it connects: a command may have changed the terminal's settings.
        stty) stty raw -echo 2>/dev/null ;;
        eval) printf '\n%s loop\n' $chvm_token ;;
        esac
    done
}
