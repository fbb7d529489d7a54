"""A training loop of its own: Adam, clipped gradients, all summaries, a Saver of everything."""

import tensorflow.compat.v1 as tf

import cifar10

cifar10.FLAGS.batch_size = 32

with tf.Graph().as_default():
    global_step = tf.Variable(0, name='global_step', trainable=False)
    images, labels = cifar10.distorted_inputs()
    logits = cifar10.inference(images)
    loss = cifar10.loss(logits, labels)
    terms = tf.get_collection('losses')
    optimizer = tf.train.AdamOptimizer(1e-4)
    gradients, variables = zip(*optimizer.compute_gradients(loss))
    gradients, _ = tf.clip_by_global_norm(gradients, 5.0)
    train_op = optimizer.apply_gradients(zip(gradients, variables), global_step=global_step)
    summary_op = tf.summary.merge_all()
    saver = tf.train.Saver(tf.global_variables())
    print('parameters:', sum(v.get_shape().num_elements() for v in tf.trainable_variables()))

    sess = tf.Session(config=tf.ConfigProto(log_device_placement=False))
    sess.run(tf.initialize_all_variables())
    tf.train.start_queue_runners(sess=sess)
    writer = tf.summary.FileWriter('logs', sess.graph)
    for step in range(12):
        _, loss_value, term_values = sess.run([train_op, loss, terms])
        if step % 5 == 0:
            print('step %d, loss = %.2f, terms: %.2f' % (step, loss_value, sum(term_values)))
            summary_str = sess.run(summary_op)
            writer.add_summary(summary_str, step)
            tags = [value.tag for value in tf.Summary.FromString(summary_str).value]
    print('tags:', ' '.join(tags))
    print('saved', saver.save(sess, './model.ckpt', global_step=step))
